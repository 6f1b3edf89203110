"""The trainer and the stock models it builds on."""
