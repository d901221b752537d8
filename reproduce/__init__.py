"""The paper's experiments: which runs, their controls, the ledger of results, tables and figures. Not installed."""
