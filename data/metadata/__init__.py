"""Records from metadata files of every supported format and from image folders, and the merge of several sources."""
