//! Tests of `Bar`: what the numbers say, when lines come, and that lines and bars do not tear each other.

use std::io;

use indicatif::TermLike;

use super::*;

fn phase(unit: Unit, total: Option<u64>) -> Bar {
    Bar::start(&Screen::Nowhere, "computing", unit, total, |_| {})
}

fn line(bar: &Bar, seconds: u64) -> String {
    bar.phase.line(Duration::from_secs(seconds))
}

#[test]
fn lines_say_what_is_known() {
    let bar = phase(Unit::Samples, Some(5_000));
    assert_eq!(line(&bar, 6), "computing: 0 of 5,000 samples, 6 s so far");
    bar.set(1_200);
    bar.detail("1460 tokens/s");
    assert_eq!(line(&bar, 60), "computing: 1,200 of 5,000 samples, 1460 tokens/s, about 3 min left");
    // The dataset turned out shorter.
    bar.set_total(1_200);
    assert_eq!(line(&bar, 60), "computing: 1,200 of 1,200 samples, 1460 tokens/s, 60 s so far");

    let bar = phase(Unit::Texts, None);
    assert_eq!(line(&bar, 6), "computing: 6 s so far");
    bar.set(12_000);
    assert_eq!(line(&bar, 6), "computing: 12,000 texts, 2,000 texts/s, 6 s so far");
}

/// What was there already has cost no time.
#[test]
fn what_was_here_before_counts_in_no_rate() {
    let bar = phase(Unit::Bytes, Some(3 << 30));
    bar.had(2 << 30);
    assert_eq!(line(&bar, 6), "computing: 0 B of 3.0 GiB, 6 s so far", "only `set` says how much is done");
    bar.set(2 << 30);
    assert_eq!(line(&bar, 6), "computing: 2.0 GiB of 3.0 GiB, 6 s so far");
    bar.set(2560 << 20);
    assert_eq!(line(&bar, 10), "computing: 2.5 GiB of 3.0 GiB, 51.2 MiB/s, about 10 s left");
    // Another file turns out to be here, of which nobody has counted anything yet.
    bar.had(2560 << 20);
    assert_eq!(line(&bar, 10), "computing: 2.5 GiB of 3.0 GiB, 10 s so far");
}

/// Who finds something here does not undo what another thread counts meanwhile.
#[test]
fn threads_count_what_is_done_and_what_was_here() {
    let bar = phase(Unit::Bytes, Some(2_000));
    std::thread::scope(|scope| {
        scope.spawn(|| (0..=1_000).for_each(|done| bar.set(done)));
        scope.spawn(|| (0..=600).for_each(|before| bar.had(before)));
    });
    assert_eq!(line(&bar, 4), "computing: 1000 B of 2.0 KiB, 100 B/s, about 10 s left");
}

#[test]
fn times_are_short() {
    for (seconds, expected) in [
        (0.4, "0 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (5_969.0, "99 min"),
        (5_970.0, "1 h 40 min"),
        (36_000.0, "10 h 0 min"),
        (172_769.0, "47 h 59 min"),
        (190_000.0, "2 d 4 h"),
    ] {
        assert_eq!(duration(seconds), expected, "{seconds}");
    }
    assert!(duration(f64::INFINITY).ends_with(" h"));
}

#[test]
fn lines_come_at_growing_intervals_until_the_bar_goes() {
    let (sender, stop) = channel();
    let said = Mutex::new(Vec::new());
    let bar = phase(Unit::Samples, Some(2));
    let first = Duration::from_millis(10);
    let (phase, times) = (&bar.phase, &said);
    std::thread::scope(|scope| {
        let say = |_: &str| times.lock().unwrap().push(Instant::now());
        scope.spawn(move || write_lines(phase, &stop, first, say));
        while said.lock().unwrap().len() < 4 {
            std::thread::sleep(first);
        }
        drop(sender);
    });
    let said = said.into_inner().unwrap();
    for (pair, least) in said.windows(2).zip([20, 40, 80]) {
        assert!(pair[1] - pair[0] >= Duration::from_millis(least), "{said:?}");
    }
}

/// A phase that is over at once says nothing, on any screen.
#[test]
fn short_phases_are_silent() {
    let terminal = Terminal::default();
    for screen in [Screen::Lines, terminal.screen()] {
        let started = Instant::now();
        drop(Bar::start(&screen, "short", Unit::Texts, None, |_| panic!("a line of a short phase")));
        assert!(started.elapsed() < FIRST_LINE);
    }
    assert_eq!(*terminal.0.lock().unwrap(), "");
}

/// What reaches the terminal; `<` stands for a line that is cleared.
#[derive(Clone, Debug, Default)]
struct Terminal(Arc<Mutex<String>>);

impl Terminal {
    fn screen(&self) -> Screen {
        let target = ProgressDrawTarget::term_like(Box::new(self.clone()));
        Screen::Bars(MultiProgress::with_draw_target(target))
    }

    fn push(&self, text: &str) -> io::Result<()> {
        self.0.lock().unwrap().push_str(text);
        Ok(())
    }

    fn wait_for(&self, text: &str) {
        let started = Instant::now();
        while !self.0.lock().unwrap().contains(text) {
            assert!(started.elapsed() < Duration::from_secs(20), "no {text:?} in {self:?}");
            std::thread::sleep(REDRAW);
        }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        80
    }
    fn height(&self) -> u16 {
        40
    }
    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn write_line(&self, text: &str) -> io::Result<()> {
        self.push(&format!("{text}\n"))
    }
    fn write_str(&self, text: &str) -> io::Result<()> {
        self.push(text)
    }
    fn clear_line(&self) -> io::Result<()> {
        self.push("<")
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_line_finds_the_bars_gone_and_they_come_back() {
    let terminal = Terminal::default();
    let screen = terminal.screen();
    let compute = Bar::start(&screen, "computing", Unit::Samples, Some(500), |_| {});
    let fetch = Bar::start(&screen, "fetching", Unit::Bytes, Some(1 << 20), |_| {});
    compute.set(120);
    fetch.set(1 << 19);
    terminal.wait_for("120 of 500 samples");
    terminal.wait_for("512.0 KiB of 1.0 MiB");
    screen.without_bars(|| terminal.push("[a line]\n").unwrap());
    let before = terminal.0.lock().unwrap().split("[a line]").next().unwrap().to_owned();
    assert!(before.ends_with('<'), "the bars are cleared before the line: {before}");
    terminal.0.lock().unwrap().clear();
    terminal.wait_for("computing");
    drop((compute, fetch));
    let after = terminal.0.lock().unwrap().clone();
    assert!(after.ends_with('<'), "the bars are cleared at their end: {after}");
}

#[test]
fn bars_can_be_shared() {
    fn shared<T: Send + Sync>() {}
    shared::<Bar>();
}
