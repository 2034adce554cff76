//! The choice of what a group goes on with after a fence (PROTOCOL.md §5, Restart; H13, R15, I8), and the authoritative
//! copy of a settle (H12). Pure, and tabled exhaustively in its tests.
//!
//! | `Active` members that answered | silent `Active` ones | the group |
//! |---|---|---|
//! | one with an unchanged boot id | any | goes on with those; restarted ones become `Failed` |
//! | only restarted ones | none | goes on with those, `loss` rises, settles |
//! | only restarted ones | some, for less than 60 s | waits for them (H13) |
//! | only restarted ones | some, for longer | goes on without them, `loss` rises, settles (R15) |
//! | none | any | waits: unavailable (I8) |

use crate::control::CopyReport;
use crate::ids::{BootId, CopyId};
use crate::mutants::{Mutant, on};

/// What a fence found out about a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen<'a> {
    /// It promised, under the boot id that the map lists.
    Same(&'a CopyReport),
    /// It promised, under another boot id.
    Restarted(&'a CopyReport),
    /// Its server answered that nothing serves this copy: the device is closed or the copy is not there.
    Gone,
    /// It did not answer and is left out: it may still serve older generations.
    Silent,
}

impl<'a> Seen<'a> {
    /// What it said of the copy, if it did.
    pub fn report(self) -> Option<&'a CopyReport> {
        match self {
            Self::Same(report) | Self::Restarted(report) => Some(report),
            Self::Gone | Self::Silent => None,
        }
    }

    /// From a report and the boot id that the map lists (H2).
    pub fn of(report: Option<&'a CopyReport>, listed: BootId) -> Self {
        match report {
            Some(report) if report.boot == listed || on(Mutant::RestartUnseen) => Self::Same(report),
            Some(report) => Self::Restarted(report),
            None => Self::Gone,
        }
    }
}

/// What a group goes on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// With the `Active` members that kept their boot id.
    GoOn,
    /// With the restarted `Active` members; the loss rises.
    Restarted,
    /// It waits for these silent ones: they may hold acknowledged writes that the restarted ones lost (H13).
    WaitForSilent(Vec<CopyId>),
    /// It waits for one of these: none that was `Active` is here (I8).
    WaitForActive(Vec<CopyId>),
}

/// The choice for a group whose `Active` members were seen so. `silent_over`: the 60 s of R15 have passed.
pub fn choose(active: &[(CopyId, Seen<'_>)], silent_over: bool) -> Choice {
    let which =
        |wanted: fn(&Seen<'_>) -> bool| active.iter().filter(move |(_, seen)| wanted(seen)).map(|(copy, _)| *copy);
    let silent: Vec<_> = which(|seen| matches!(seen, Seen::Silent)).collect();
    if which(|seen| matches!(seen, Seen::Same(_))).next().is_some() {
        Choice::GoOn
    } else if which(|seen| matches!(seen, Seen::Restarted(_))).next().is_none() {
        Choice::WaitForActive(active.iter().map(|(copy, _)| *copy).collect())
    } else if !silent.is_empty() && !silent_over && !on(Mutant::SilentNotWaited) {
        Choice::WaitForSilent(silent)
    } else {
        Choice::Restarted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(boot: u128) -> CopyReport {
        CopyReport {
            copy: CopyId(1),
            boot: BootId(boot),
            unsynced: 0,
            pending: Vec::new(),
            pending_before_start: 0,
            settled_for: None,
            to_settle: 0,
            listed: true,
        }
    }

    /// S = same boot, R = restarted, G = gone, - = silent.
    fn chosen(text: &str, over: bool) -> Choice {
        let (same, other) = (report(1), report(2));
        let seen = |c| match c {
            'S' => Seen::Same(&same),
            'R' => Seen::Restarted(&other),
            'G' => Seen::Gone,
            _ => Seen::Silent,
        };
        let members: Vec<_> = text.chars().enumerate().map(|(i, c)| (CopyId(i as u128), seen(c))).collect();
        choose(&members, over)
    }

    #[test]
    fn the_choice_of_what_goes_on_is_this_table_for_every_combination_of_up_to_five() {
        let letters = ['S', 'R', 'G', '-'];
        let mut rows = vec![String::new()];
        for _ in 0..5 {
            rows = rows.iter().flat_map(|row| letters.iter().map(move |c| format!("{row}{c}"))).collect();
            for row in &rows {
                for over in [false, true] {
                    let expected = match (row.contains('S'), row.contains('R'), row.contains('-') && !over) {
                        (true, _, _) => 0,
                        (false, true, false) => 1,
                        (false, true, true) => 2,
                        (false, false, _) => 3,
                    };
                    let got = match chosen(row, over) {
                        Choice::GoOn => 0,
                        Choice::Restarted => 1,
                        Choice::WaitForSilent(copies) => {
                            assert_eq!(copies.len(), row.matches('-').count());
                            2
                        }
                        Choice::WaitForActive(copies) => {
                            assert_eq!(copies.len(), row.len());
                            3
                        }
                    };
                    assert_eq!(got, expected, "{row} {over}");
                }
            }
        }
    }

    #[test]
    fn h13_a_restarted_member_alone_never_goes_on_while_a_silent_one_may_hold_more() {
        assert_eq!(chosen("-R", false), Choice::WaitForSilent(vec![CopyId(0)]));
    }

    #[test]
    fn r15_after_the_wait_the_silent_member_is_left_out_with_a_raised_loss() {
        assert_eq!(chosen("-R", true), Choice::Restarted);
    }

    #[test]
    fn i8_without_an_active_member_nothing_goes_on_however_long_it_waits() {
        assert_eq!(chosen("-G", true), Choice::WaitForActive(vec![CopyId(0), CopyId(1)]));
    }
}
