"""What crosses a process boundary: identities, events, topics, tables, collection, HTTP bodies. Pure data, no I/O."""
