"""Reading and writing files, without torch: images, and files of others that are not trusted."""
