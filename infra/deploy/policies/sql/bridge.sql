-- Rows are written, marked and purged; scans are jobs. No table is made or changed.
GRANT SELECT, INSERT, UPDATE, DELETE ON `image\_search`.* TO 'bridge'@'%';
