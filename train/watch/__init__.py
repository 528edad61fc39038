"""The page that shows runs while they train; its server only reads files. The report page belongs in report/."""
