//! Event log, pictures, curves and the report page.

use metazoa::app::report::write_report;
use metazoa::data::decode::decode_picture;
use metazoa::report::{
    Event, EventLog, Series, contact_sheet, line_plot, mean_with_ci, read_events,
};
use metazoa::tensor::Images;

use crate::runs::finished_run;
use crate::support::{run_in, temp_dir};

#[test]
fn events_come_back_as_they_were_written() {
    let here = temp_dir();
    let path = here.path().join("events.jsonl");
    let events: Vec<Event> = (0..5)
        .map(|step| {
            Event::new(0.5, "recover", step).model("a/b").value("loss", 0.1).value("bad", f64::NAN)
        })
        .collect();
    for half in [&events[..2], &events[2..]] {
        let log = EventLog::append(&path).unwrap();
        half.iter().for_each(|event| log.write(event).unwrap());
    }
    let read = read_events(&path).unwrap();
    assert_eq!(read, events);
    assert_eq!(read[0].values["bad"], None);
}

#[test]
fn a_killed_run_loses_its_cut_last_line_only() {
    let here = temp_dir();
    let path = here.path().join("events.jsonl");
    let log = EventLog::append(&path).unwrap();
    log.write(&Event::new(0.0, "meta", 0)).unwrap();
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, [whole.as_slice(), b"{\"t\":1.0,\"sta"].concat()).unwrap();
    assert_eq!(read_events(&path).unwrap().len(), 1);
    EventLog::append(&path).unwrap().write(&Event::new(2.0, "meta", 1)).unwrap();
    let steps: Vec<u64> = read_events(&path).unwrap().iter().map(|event| event.step).collect();
    assert_eq!(steps, [0, 1]);
}

#[test]
fn a_damaged_line_is_named() {
    let here = temp_dir();
    let path = here.path().join("events.jsonl");
    std::fs::write(&path, "{\"t\":0,\"stage\":\"a\",\"step\":0}\nrubbish\n").unwrap();
    let error = read_events(&path).unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
}

#[test]
fn threads_write_whole_lines() {
    let here = temp_dir();
    let path = here.path().join("events.jsonl");
    let log = EventLog::append(&path).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let log = &log;
            scope.spawn(move || {
                for step in 0..200 {
                    log.write(&Event::new(0.0, &format!("stage{thread}"), step)).unwrap();
                }
            });
        }
    });
    assert_eq!(read_events(&path).unwrap().len(), 800);
}

#[test]
fn the_interval_covers_the_truth_in_about_95_of_100_samples() {
    let mut rng = metazoa::tensor::RngStream::new(1, "coverage", "", 0);
    let covered = (0..1000)
        .filter(|_| {
            let sample: Vec<f64> = (0..100).map(|_| f64::from(rng.uniform())).collect();
            let estimate = mean_with_ci(&sample);
            (estimate.accuracy - 0.5).abs() <= estimate.ci95
        })
        .count();
    assert!((925..=975).contains(&covered), "{covered}");
}

#[test]
fn a_contact_sheet_has_a_row_a_class() {
    // Three images of 2x2: class 1 is red, class 0 green and blue.
    let mut images = Images::zeros([3, 3, 2, 2]);
    for (image, channel) in [(0, 0), (1, 1), (2, 2)] {
        images.data_mut()[image * 12 + channel * 4..][..4].fill(1.5);
    }
    let png = contact_sheet(&images, &[1, 0, 0], 10).unwrap();
    let sheet = decode_picture(&png).unwrap();
    let pixel = |x: usize, y: usize| &sheet.rgb[(y * sheet.width + x) * 3..][..3];
    let (right, below) = (sheet.width - 1, sheet.height - 1);
    assert_eq!(pixel(0, 0), [0, 255, 0]);
    assert_eq!(pixel(right, 0), [0, 0, 255]);
    assert_eq!(pixel(0, below), [255, 0, 0]);
    assert!(contact_sheet(&images, &[1, 0], 10).is_err());
}

#[test]
fn a_plot_is_an_svg_and_nothing_finite_is_no_plot() {
    let points = (0..5000).map(|i| (f64::from(i), f64::from(i % 7))).collect();
    let series = [
        Series { name: "loss".into(), points },
        Series { name: "hole".into(), points: vec![(1.0, f64::NAN), (2.0, 1e9)] },
    ];
    let svg = line_plot("step", "loss", &series).unwrap().unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("polyline") && svg.trim().ends_with("</svg>"));
    assert!(svg.len() < 60_000, "long series are thinned: {}", svg.len());
    assert!(!svg.contains("NaN"));
    assert_eq!(line_plot("step", "loss", &series[1..1]).unwrap(), None);
}

#[test]
fn a_report_shows_everything_and_needs_nothing_from_outside() {
    let here = temp_dir();
    let run = finished_run(&here.path().join("r"));
    let images = Images::zeros([4, 3, 8, 8]);
    run.write("bank/sheet.png", &contact_sheet(&images, &[0, 0, 1, 1], 4).unwrap()).unwrap();
    let result = write_report(&run).unwrap();
    let page = std::fs::read_to_string(&result.path).unwrap();
    assert_eq!(page.len() as u64, result.bytes);
    for part in [
        "glyphs/r&lt;10&gt;",
        "the file ends early",
        "export it again",
        "data:image/png;base64,",
        "<svg",
        "metazoa train &#39;my zoo&#39; --out runs/a",
        "cross_model_share",
        &"ab".repeat(32),
        "prefers-color-scheme: dark",
        "Not evaluated yet",
    ] {
        assert!(page.contains(part), "missing: {part}");
    }
    for outside in ["<script", "<link", "src=\"http", "url("] {
        assert!(!page.contains(outside), "found: {outside}");
    }
}

#[test]
fn report_of_a_folder_that_is_no_run_is_one_error() {
    let here = temp_dir();
    let ran = run_in(here.path(), &["report", "."]);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""));
    insta::assert_snapshot!(ran.stderr, @r"
    error: not a run folder: `.`
    hint: a run folder holds `run.json` and `config.yaml`, made by `metazoa train`
    ");
}
