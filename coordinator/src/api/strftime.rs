//! ○ The few date formats that chat templates use.

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// The weekdays, beginning with that of 1970-01-01.
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `now` (seconds since 1970, UTC) in a strftime format.
pub fn format(format: &str, now: u64) -> Result<String, Error> {
    let (days, second) = (now / 86_400, now % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        // `%-d` is the number without its leading zero.
        let (bare, directive) =
            if directive == Some('-') { (true, chars.next()) } else { (false, directive) };
        let mut number = |value: u64, width: usize| {
            let width = if bare { 0 } else { width };
            out.push_str(&format!("{value:0width$}"));
        };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(second / 3600, 2),
            Some('I') => number((second / 3600 + 11) % 12 + 1, 2),
            Some('M') => number(second / 60 % 60, 2),
            Some('S') => number(second % 60, 2),
            Some('j') => number(days - days_before(year) + 1, 3),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('p') => out.push_str(if second < 43_200 { "AM" } else { "PM" }),
            Some('%') => out.push('%'),
            other => {
                let directive = other.map(String::from).unwrap_or_default();
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know %{directive}"),
                ));
            }
        }
    }
    Ok(out)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Days from 1970-01-01 to the first of January of `year`, which is at least 1970.
fn days_before(year: u64) -> u64 {
    let past = year - 1;
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(past) - leaps(1969)
}

/// Year, month and day of a day since 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before(year + 1) <= days {
        year += 1;
    }
    let mut rest = days - days_before(year);
    let february = if is_leap(year) { 29 } else { 28 };
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        for (now, expected) in [
            (0, "1970-01-01 00:00:00 Thu 001"),
            (951_782_400, "2000-02-29 00:00:00 Tue 060"),
            (951_868_799, "2000-02-29 23:59:59 Tue 060"),
            (4_107_542_400, "2100-03-01 00:00:00 Mon 060"),
            (1_735_603_200, "2024-12-31 00:00:00 Tue 366"),
            (1_795_252_052, "2026-11-21 09:07:32 Sat 325"),
        ] {
            let found = format("%Y-%m-%d %H:%M:%S %a %j", now).expect("known directives");
            assert_eq!(found, expected);
        }
        assert_eq!(
            format("%-d %B %y, %-I %p 100%%", 0).expect("known"),
            "1 January 70, 12 AM 100%"
        );
        assert!(format("%Q", 0).is_err());
        assert!(format("%", 0).is_err());
    }
}
