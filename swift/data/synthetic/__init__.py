"""Synthetic cohorts of 4D BOLD scans with planted truth.

`make_subject` makes a scan, `write_bids` and `write_store` a cohort on disk with its truth beside it, `synthetic_store`
the small cached cohort that pre-training falls back to.
"""

from swift.data.synthetic.cli import add_arguments, run
from swift.data.synthetic.courses import course_autocorrelation
from swift.data.synthetic.labels import Person, cohort_table, dprime, person, phenotypes
from swift.data.synthetic.maps import Geometry, geometry
from swift.data.synthetic.scan import SyntheticScan, make_subject
from swift.data.synthetic.spec import CohortSpec
from swift.data.synthetic.write import (
    load_truth,
    synthetic_store,
    write_bids,
    write_store,
)

__all__ = [
    "CohortSpec",
    "Geometry",
    "Person",
    "SyntheticScan",
    "add_arguments",
    "cohort_table",
    "course_autocorrelation",
    "dprime",
    "geometry",
    "load_truth",
    "make_subject",
    "person",
    "phenotypes",
    "run",
    "synthetic_store",
    "write_bids",
    "write_store",
]
