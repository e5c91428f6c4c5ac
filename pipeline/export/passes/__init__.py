"""Graph passes: each states its algebra, and its test compares the graph before and after."""
