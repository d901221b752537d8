"""The paper's experiments, their controls, the ledger of results, tables and figures. Not installed."""
