"""The report: tables, fits, plots and one page, computed from records alone.

write_report(["/storage/runs"], Path("report"))     # CSVs, plots/, index.html
compare(read_records([old]), read_records([new]))   # which points regressed beyond noise
"""

from diffscale.report.analysis import Analysis, analyse
from diffscale.report.stats.compare import compare, regressed
from diffscale.report.write import write_report

__all__ = ["Analysis", "analyse", "compare", "regressed", "write_report"]
