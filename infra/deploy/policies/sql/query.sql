-- Searches only read; what people say of an image is written (image_metadata).
GRANT SELECT, INSERT, UPDATE ON `image\_search`.* TO 'query'@'%';
