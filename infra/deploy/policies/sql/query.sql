-- Searches only read. When a key was last used is written down; CREATE lets this be granted before `upgrade` made the table.
GRANT SELECT ON `image\_search`.* TO 'query'@'%';
GRANT CREATE, UPDATE ON `image_search`.`api_keys` TO 'query'@'%';
