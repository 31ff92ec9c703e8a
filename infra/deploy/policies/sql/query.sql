-- Searches only read. The last use of a key is written down, a job asked for, and the previous model made the active one.
-- CREATE lets the rights to one table be granted before `upgrade` made it.
GRANT SELECT ON `image\_search`.* TO 'query'@'%';
GRANT CREATE, UPDATE ON `image_search`.`api_keys` TO 'query'@'%';
GRANT CREATE, INSERT ON `image_search`.`jobs` TO 'query'@'%';
GRANT CREATE, UPDATE ON `image_search`.`models` TO 'query'@'%';
GRANT CREATE, INSERT, UPDATE ON `image_search`.`image_metadata` TO 'query'@'%';
