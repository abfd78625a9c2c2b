"""Reading and writing files: images, and files of others that are not trusted. Only `pth` imports
torch."""
