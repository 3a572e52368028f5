"""Who may ask, how much, and what each request cost: keys, quotas, receipts, the account routes."""
