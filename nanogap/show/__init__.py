"""What people see: the picture, --explain, explain_ids, figures."""
