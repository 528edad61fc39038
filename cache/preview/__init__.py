"""The preview of the data as the model will see it: tables and a contact sheet."""
