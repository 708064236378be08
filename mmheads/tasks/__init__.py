"""Tasks whose examples carry their evidence."""
