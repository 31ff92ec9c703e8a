"""Alembic's own: one set of migrations for MySQL, MariaDB and SQLite. Run by `image-search upgrade`, never by a worker."""
