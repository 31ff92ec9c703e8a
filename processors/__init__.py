"""Object events in; vectors, rows and outcomes out."""
