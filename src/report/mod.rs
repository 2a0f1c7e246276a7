//! What a run leaves for people: statistics, the event log, pictures, curves, the HTML report.
//!
//! Everything here turns numbers into text or bytes; files are named by `app`.

pub mod events;
pub mod html;
pub mod pictures;
pub mod plots;
pub mod statistics;

pub use events::{Event, EventLog, read_events};
pub use pictures::{contact_sheet, image_png};
pub use plots::{Axis, MeasuredSeries, Measurement, Series, line_plot, measured_plot};
pub use statistics::{Estimate, mean_with_ci, paired_difference, student_ci95};
