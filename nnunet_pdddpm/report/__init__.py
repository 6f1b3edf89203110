"""One self-contained HTML page over a folder of predictions: which case to look at first, and where in it."""
from nnunet_pdddpm.report.page import NothingToShow, write_report

__all__ = ['NothingToShow', 'write_report']
