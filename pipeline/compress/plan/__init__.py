"""Which form, rank and bits each group gets, and what that is expected to cost."""
