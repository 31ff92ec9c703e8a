-- No table is made or changed.
GRANT SELECT, INSERT, UPDATE, DELETE ON `image\_search`.* TO 'worker'@'%';
