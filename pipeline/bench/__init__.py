"""How fast a model decodes, measured against the memory it must read; or predicted from it."""
