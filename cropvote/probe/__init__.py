"""Whether a model can be split at a site without a silent wrong number; found out on a fake copy of it."""
