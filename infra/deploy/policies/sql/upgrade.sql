-- The one that makes and changes tables.
GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP, INDEX, REFERENCES ON `image\_search`.* TO 'upgrade'@'%';
