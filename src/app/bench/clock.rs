//! What a clock tells of a cell: the date, and how long this process was busy.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds of processor time of this process and of children it has waited for, over all threads; `None` where the
/// system does not tell.
pub(super) fn busy_seconds() -> Option<f64> {
    // The kernel counts in hundredths of a second for user space on every architecture of Linux (USER_HZ).
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, the program's name, may hold anything but ends with the last bracket. After it come the third
    // field and so on: the times are the 14th to the 17th.
    let (_, fields) = text.rsplit_once(')')?;
    let times: Vec<f64> = fields.split_whitespace().skip(11).take(4).flat_map(str::parse).collect();
    (times.len() == 4).then(|| times.iter().sum::<f64>() / TICKS)
}

/// Today in UTC, as `2026-11-22`.
pub(super) fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date_of_day(seconds / 86_400)
}

/// The Gregorian date `days` after 1970-01-01, by whole eras of 400 years that begin in March.
fn date_of_day(days: u64) -> String {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (year, month) =
        if month < 10 { (year + era * 400, month + 3) } else { (year + era * 400 + 1, month - 9) };
    format!("{year}-{month:02}-{day_of_month:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        // `date -u -d @$((86400 * N)) +%F`
        for (day, date) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_779, "2026-11-22"),
            (20_818, "2026-12-31"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date_of_day(day), date, "{day}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn work_makes_this_process_busy() {
        let before = busy_seconds().unwrap();
        let mut sum = 0_u64;
        while busy_seconds().unwrap() < before + 0.02 {
            sum = (0..100_000_u64).fold(sum, |sum, n| std::hint::black_box(sum ^ n));
        }
        assert!(busy_seconds().unwrap() < before + 100.0);
    }
}
