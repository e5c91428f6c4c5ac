"""The ledger: what each stage of the pipeline did to the numbers."""
