"""Images: data sets by name, shapes, photographs, image folders, and rows cached on disk."""
