"""What executors of several ranks share: options, messages, the rank's side (`runner`) and the executor's (`ledger`).

Nothing here knows how messages travel; `multiprocess` and `ray` differ in that alone.
"""
