-- Searches only read.
GRANT SELECT ON `image\_search`.* TO 'query'@'%';
