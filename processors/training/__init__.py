"""What is done to models before they serve: edits of pictures, evaluation. No serving process imports any of it."""
