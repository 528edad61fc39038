"""The page that shows runs while they go on; its server only reads files. The report page belongs in report/."""
