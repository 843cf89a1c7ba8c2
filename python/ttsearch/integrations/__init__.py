"""Drop-ins for other libraries. None of them is imported here: each file fits by signature alone."""
