//! Progress bars on stderr; the drawing side of [`crate::app::Progress`].

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::printer::Printer;
use super::settings::Talk;
use crate::app::{Progress, Stage};

/// Draws one bar a stage. When bars are off it only prints notes.
#[derive(Debug)]
pub(crate) struct Bars {
    bars: MultiProgress,
    talk: Talk,
}

impl Bars {
    /// Bars drawn by `printer`.
    pub(crate) fn new(printer: &Printer, talk: Talk) -> Self {
        Self { bars: printer.bars().clone(), talk }
    }
}

impl Progress for Bars {
    fn stage(&self, name: &str, total: Option<u64>) -> Box<dyn Stage> {
        let bar = match total {
            Some(total) => ProgressBar::new(total).with_style(style(
                "{prefix:>10} [{bar:30}] {pos}/{len} {msg} {elapsed} (left {eta})",
            )),
            None => {
                ProgressBar::new_spinner().with_style(style("{prefix:>10} {spinner} {pos} {msg}"))
            }
        };
        let bar = self.bars.add(bar.with_prefix(name.to_owned()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Box::new(BarStage { bar })
    }

    fn note(&self, text: &str) {
        if self.talk > Talk::Quiet {
            self.bars.suspend(|| {
                use std::io::Write;
                let _ = writeln!(std::io::stderr().lock(), "{text}");
            });
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

struct BarStage {
    bar: ProgressBar,
}

impl Stage for BarStage {
    fn advance(&self, steps: u64) {
        self.bar.inc(steps);
    }

    fn message(&self, text: &str) {
        self.bar.set_message(text.to_owned());
    }
}

impl Drop for BarStage {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
