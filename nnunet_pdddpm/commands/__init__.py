"""One thin module per console command."""
