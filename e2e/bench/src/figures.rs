//! Rounds of the rows as figures: medians, ratios within a round, and their spread.
//!
//! Invariant: a ratio is taken between two runs of the same row in the same round, which stand next to each other in
//! time; the machine's moods then hit both. The median and the least and greatest of the rounds are shown, never a mean.

use crate::load::Outcome;
use std::collections::BTreeMap;
use std::time::Duration;

/// One run of one row by one contender.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// What fio says.
    pub outcome: Outcome,
    /// CPU time of the contender's processes meanwhile.
    pub cpu: Duration,
}

/// Which row and which contender, by their places in the lists.
pub type Place = (usize, usize);

/// All rounds.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    rounds: BTreeMap<Place, Vec<Sample>>,
}

/// Median, least and greatest of the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Least.
    pub least: f64,
    /// Greatest.
    pub greatest: f64,
}

impl Spread {
    /// Of these numbers; `None` of none, or where one is no number (a ratio to nothing).
    #[must_use]
    pub fn of(mut numbers: Vec<f64>) -> Option<Self> {
        if numbers.is_empty() || !numbers.iter().all(|number| number.is_finite()) {
            return None;
        }
        numbers.sort_by(f64::total_cmp);
        let (low, high) = (numbers[(numbers.len() - 1) / 2], numbers[numbers.len() / 2]);
        Some(Self { median: f64::midpoint(low, high), least: numbers[0], greatest: numbers[numbers.len() - 1] })
    }
}

impl Sample {
    /// Microseconds of CPU of the contender's processes for a request.
    #[must_use]
    pub fn cpu_each(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.outcome.requests as f64
    }

    /// Microseconds of CPU of the client for a request.
    #[must_use]
    pub fn client_cpu_each(&self) -> f64 {
        self.outcome.client_cpu.as_secs_f64() * 1e6 / self.outcome.requests as f64
    }

    /// Requests a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.outcome.rate
    }

    /// Median latency in microseconds.
    #[must_use]
    pub fn p50(&self) -> f64 {
        self.outcome.p50
    }

    /// 99th percentile of latency in microseconds.
    #[must_use]
    pub fn p99(&self) -> f64 {
        self.outcome.p99
    }
}

impl Figures {
    /// Takes the next round's run of a place.
    pub fn add(&mut self, place: Place, sample: Sample) {
        self.rounds.entry(place).or_default().push(sample);
    }

    /// One figure over the rounds.
    #[must_use]
    pub fn of(&self, place: Place, figure: fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.rounds.get(&place)?.iter().map(figure).collect())
    }

    /// One figure as a ratio to another contender's in the same round.
    #[must_use]
    pub fn ratio(&self, place: Place, to: usize, figure: fn(&Sample) -> f64) -> Option<Spread> {
        let (mine, theirs) = (self.rounds.get(&place)?, self.rounds.get(&(place.0, to))?);
        Spread::of(mine.iter().zip(theirs).map(|(mine, theirs)| figure(mine) / figure(theirs)).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sample(cpu_micros: u64) -> Sample {
        let outcome = Outcome { requests: 10, rate: 5.0, p50: 1.0, p99: 2.0, longest: 3.0, client_cpu: Duration::ZERO };
        Sample { outcome, cpu: Duration::from_micros(cpu_micros) }
    }

    #[test]
    fn a_ratio_is_taken_within_each_round_and_its_median_is_shown() {
        let mut figures = Figures::default();
        for (mine, theirs) in [(20, 10), (900, 300), (40, 40)] {
            figures.add((0, 1), sample(mine));
            figures.add((0, 0), sample(theirs));
        }
        let ratio = figures.ratio((0, 1), 0, Sample::cpu_each).unwrap();
        assert_eq!(ratio, Spread { median: 2.0, least: 1.0, greatest: 3.0 });
        assert_eq!(figures.of((0, 0), Sample::cpu_each).unwrap().median, 4.0);
        assert_eq!(figures.ratio((0, 1), 7, Sample::cpu_each), None);
    }

    #[test]
    fn a_ratio_to_nothing_is_no_figure() {
        assert_eq!(Spread::of(vec![1.0 / 0.0]), None);
        assert_eq!(Spread::of(vec![1.0, 2.0]).unwrap().median, 1.5);
    }
}
