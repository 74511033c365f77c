//! Scales and their ticks, which are at steps of 1, 2 or 5, or at powers of ten.

/// The range of an axis and how it is divided.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    log: bool,
    /// Value and label of each tick.
    pub(super) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// An axis that shows all values; a logarithmic one leaves out those that are not positive. `tight` axes end at the outermost values,
    /// others at about the next tick.
    pub(super) fn new(values: impl Iterator<Item = f64>, log: bool, tight: bool, count: usize) -> Axis {
        let mut range = (f64::INFINITY, f64::NEG_INFINITY);
        // Beyond 1e300 even the span of the axis would overflow, so such values are left out like infinity.
        for v in values.filter(|v| v.abs() <= 1e300 && (!log || *v > 0.0)) {
            range = (range.0.min(v), range.1.max(v));
        }
        if range.0 > range.1 {
            range = (if log { 0.1 } else { 0.0 }, 1.0);
        }
        if log { Self::logarithmic(range, tight) } else { Self::linear(range, tight, count) }
    }

    fn linear((mut low, mut high): (f64, f64), tight: bool, count: usize) -> Axis {
        if high - low <= 1e-12 * low.abs().max(high.abs()) {
            let margin = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            (low, high) = (low - margin, high + margin);
        }
        let rough = (high - low) / count.max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= rough * 0.999).unwrap_or(10.0);
        if !tight {
            // A margin of up to half a step is enough where the next tick is far off.
            (low, high) = ((low / step * 2.0).floor() * step / 2.0, (high / step * 2.0).ceil() * step / 2.0);
        }
        let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
        let largest = low.abs().max(high.abs());
        let ticks = (first..=last).map(|i| (i as f64 * step, label(i as f64 * step, step, largest))).collect();
        Axis { low, high, log: false, ticks }
    }

    fn logarithmic((mut low, mut high): (f64, f64), tight: bool) -> Axis {
        if high / low < 1.0 + 1e-9 {
            (low, high) = (low / 2.0, high * 2.0);
        }
        let decades = (high / low).log10();
        let parts: &[f64] = if decades < 1.2 {
            &[1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
        } else if decades < 3.0 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let every = ((decades / 8.0).ceil() as i32).max(1);
        let exponents = low.log10().floor() as i32 - 1..=high.log10().ceil() as i32 + 1;
        let all: Vec<f64> = exponents
            .filter(|e| e.rem_euclid(every) == 0)
            .flat_map(|e| parts.iter().map(move |p| p * 10f64.powi(e)))
            .collect();
        if !tight {
            // The axis ends at the next tick if that is near. Data must neither lie on the frame nor be compressed to a strip.
            let (down, up) = (low / 10f64.powf(decades * 0.04), high * 10f64.powf(decades * 0.04));
            let near = move |v: f64| v >= low / 10f64.powf(decades * 0.15) && v <= high * 10f64.powf(decades * 0.15);
            low = all.iter().copied().rfind(|&v| v <= low && near(v)).unwrap_or(down);
            high = all.iter().copied().find(|&v| v >= high && near(v)).unwrap_or(up);
        }
        let inside = |v: &f64| *v >= low * (1.0 - 1e-9) && *v <= high * (1.0 + 1e-9);
        let ticks = all.into_iter().filter(inside).map(|v| (v, log_label(v))).collect();
        Axis { low, high, log: true, ticks }
    }

    /// The position of a value, from 0 to 1; `None` if it cannot be shown.
    pub(super) fn place(&self, value: f64) -> Option<f32> {
        let (value, low, high) = match self.log {
            true if value > 0.0 => (value.ln(), self.low.ln(), self.high.ln()),
            true => return None,
            false => (value, self.low, self.high),
        };
        let place = (value - low) / (high - low);
        (-0.01..=1.01).contains(&place).then_some(place as f32)
    }

    /// The lowest value: bars start there, and bands that reach below the axis end there.
    pub(super) fn low(&self) -> f64 {
        self.low
    }
}

/// A number with as many decimals as the step between ticks needs.
fn label(value: f64, step: f64, largest: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e15).contains(&largest) {
        return scientific(value);
    }
    let (unit, suffix) = match largest {
        l if l >= 1e12 => (1e12, "T"),
        l if l >= 1e9 => (1e9, "G"),
        l if l >= 1e6 => (1e6, "M"),
        l if l >= 1e4 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let decimals = (-(step / unit).log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{:.decimals$}{suffix}", value / unit).replace('-', "−")
}

fn log_label(value: f64) -> String {
    if (1e4..1e6).contains(&(value * 1.000001)) {
        let whole = value.round() as u64;
        return format!("{},{:03}", whole / 1000, whole % 1000);
    }
    if (1e-3..1e4).contains(&(value * 1.000001)) {
        let text = format!("{value:.6}");
        return text.trim_end_matches('0').trim_end_matches('.').to_string();
    }
    scientific(value)
}

fn scientific(value: f64) -> String {
    let text = format!("{value:.1e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let mantissa = mantissa.trim_end_matches(".0");
    let raised: String = exponent
        .chars()
        .map(|c| match c {
            '-' => '⁻',
            c => c.to_digit(10).and_then(|d| "⁰¹²³⁴⁵⁶⁷⁸⁹".chars().nth(d as usize)).unwrap_or(c),
        })
        .collect();
    if mantissa == "1" { format!("10{raised}") } else { format!("{mantissa}×10{raised}").replace('-', "−") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64], log: bool) -> Vec<String> {
        Axis::new(values.iter().copied(), log, false, 5).ticks.into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(labels(&[0.03, 2.3], false), ["0", "0.5", "1.0", "1.5", "2.0", "2.5"]);
        assert_eq!(labels(&[0.0, 20000.0], false), ["0", "5k", "10k", "15k", "20k"]);
        assert_eq!(labels(&[-1.0, 1.0], false), ["−1.0", "−0.5", "0", "0.5", "1.0"]);
        assert_eq!(labels(&[1e-5, 1e-1], true), ["10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1"]);
        assert_eq!(labels(&[1.0, 90.0], true), ["1", "2", "5", "10", "20", "50", "100"]);
    }

    #[test]
    fn odd_values_do_no_harm() {
        for log in [false, true] {
            for values in [&[][..], &[f64::NAN], &[3.0], &[0.0], &[-5.0], &[f64::INFINITY, 1.0], &[1e300, -1e300]] {
                let axis = Axis::new(values.iter().copied(), log, false, 5);
                assert!(axis.ticks.len() < 30, "{values:?} {:?}", axis.ticks);
                assert!(axis.place(1.0).is_none_or(|p| p.is_finite()));
            }
        }
        let axis = Axis::new([1.0, 3.0].into_iter(), false, true, 5);
        assert_eq!((axis.place(1.0), axis.place(2.0), axis.place(3.0)), (Some(0.0), Some(0.5), Some(1.0)));
        assert_eq!(axis.place(f64::NAN), None);
        assert_eq!(scientific(2.5e-7), "2.5×10⁻⁷");
    }
}
