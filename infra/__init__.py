"""The one home of client libraries, and of what runs the rest. Imports schemas, never a service."""
