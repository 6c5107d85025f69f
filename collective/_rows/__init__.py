"""Row streams: who gets which row (order, ledger), what rows are (formats), and the two ends of a stream."""
