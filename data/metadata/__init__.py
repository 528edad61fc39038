"""Records: metadata files of every supported form, image folders, and how several sources merge."""
