//! Everybody the leader knows: the members of the view, the rows of the control database, and whom an earlier leader
//! left behind.

use std::collections::BTreeMap;
use std::sync::Arc;

use domain::membership::Joining;
use domain::place::Admission;
use domain::time::Millis;
use domain::view::{MemberInfo, Offer};
use domain::{Incarnation, Member, ProcessName, Reason, Role};
use proto::link::{JoinRequest, PutNode, Refusal};
use proto::view::{offer_from_message, offer_to_message};

use crate::links::malformed;

/// How often a node that is to drain and does not is told so again.
const DRAIN_EVERY_MS: u64 = 1_000;
const OFFERS_MAX: usize = 256;
const ADDRESS_BYTES_MAX: usize = 512;

pub(crate) const ALIVE: &str = "alive";
pub(crate) const SUSPECT: &str = "suspect";
pub(crate) const STORELESS: &str = "storeless";
pub(crate) const DEAD: &str = "dead";
pub(crate) const LEFT: &str = "left";
const CORDONED: &str = Admission::Cordoned.as_str();
const DRAINING: &str = Admission::Draining.as_str();

/// A join that was read and checked.
pub(crate) struct Joined {
    pub(crate) joining: Joining,
    pub(crate) offers: Arc<[Offer]>,
}

/// Reads what a node says of itself.
pub(crate) fn read_join(request: JoinRequest) -> Result<Joined, Refusal> {
    let wrong = |error: domain::Error| malformed(error.to_string());
    let name: ProcessName = request.name.parse().map_err(wrong)?;
    if request.incarnation == 0 {
        return Err(malformed("an incarnation is at least 1"));
    }
    if request.address.is_empty() || ADDRESS_BYTES_MAX < request.address.len() {
        return Err(malformed("the address of the cluster listener is host:port"));
    }
    if OFFERS_MAX < request.capabilities.len() {
        return Err(malformed(format!("at most {OFFERS_MAX} capabilities are allowed")));
    }
    let offers: Result<Arc<[Offer]>, _> =
        request.capabilities.into_iter().map(offer_from_message).collect();
    let offers = offers.map_err(wrong)?;
    let capabilities = offers.iter().map(|offer| offer.capability.clone()).collect();
    let joining = Joining {
        member: Member { name, incarnation: Incarnation(request.incarnation) },
        zone: request.zone,
        capacity: request.capacity.max(1),
        capabilities: domain::CapabilitySet(capabilities),
        address: request.address,
    };
    Ok(Joined { joining, offers })
}

/// Whether it was neither dead nor gone when the row was written.
pub(crate) fn is_in(row: &PutNode) -> bool {
    [ALIVE, SUSPECT, STORELESS].contains(&row.state.as_str())
}

#[derive(Debug, Default)]
pub(crate) struct Roster {
    pub(crate) members: BTreeMap<ProcessName, MemberInfo>,
    pub(crate) rows: BTreeMap<ProcessName, PutNode>,
    /// Who is to drain and has not said that it does, and when it was told last.
    drains: BTreeMap<Member, Option<Millis>>,
}

impl Roster {
    /// From what the leaders before us wrote down. Rows that cannot be read are nobody's.
    pub(crate) fn new(rows: Vec<PutNode>) -> Self {
        let mut roster = Self::default();
        for row in rows {
            let Ok(name) = row.name.parse::<ProcessName>() else { continue };
            if is_in(&row) {
                let incarnation = Incarnation(row.incarnation);
                let offers = row.capabilities.iter().cloned().map(offer_from_message);
                let info = MemberInfo {
                    role: Role::Node,
                    incarnation,
                    address: row.address.clone(),
                    beat: String::new(),
                    offers: offers.filter_map(Result::ok).collect(),
                };
                roster.members.insert(name.clone(), info);
            }
            roster.rows.insert(name, row);
        }
        roster
    }

    /// Whom earlier leaders declared dead.
    pub(crate) fn buried(&self) -> impl Iterator<Item = Member> + '_ {
        let is_gone = |row: &&PutNode| row.state == DEAD || row.state == LEFT;
        self.rows.values().filter(is_gone).filter_map(|row| {
            Some(Member { name: row.name.parse().ok()?, incarnation: Incarnation(row.incarnation) })
        })
    }

    /// Who was in under the leader before us.
    pub(crate) fn alive(&self) -> impl Iterator<Item = Joining> + '_ {
        self.members.iter().filter_map(|(name, info)| {
            let row = self.rows.get(name)?;
            let offers = info.offers.iter().map(|offer| offer.capability.clone());
            Some(Joining {
                member: Member { name: name.clone(), incarnation: info.incarnation },
                zone: row.zone.clone(),
                capacity: row.capacity.max(1),
                capabilities: domain::CapabilitySet(offers.collect()),
                address: row.address.clone(),
            })
        })
    }

    /// Who did not reach its store under the leader before us.
    pub(crate) fn storeless(&self) -> impl Iterator<Item = Member> + '_ {
        let rows = self.rows.values().filter(|row| row.state == STORELESS);
        rows.filter_map(|row| {
            Some(Member { name: row.name.parse().ok()?, incarnation: Incarnation(row.incarnation) })
        })
    }

    /// Whom an operator cordoned.
    pub(crate) fn cordoned(&self) -> impl Iterator<Item = ProcessName> + '_ {
        let rows = self.rows.iter().filter(|(_, row)| row.admission == CORDONED);
        rows.map(|(name, _)| name.clone())
    }

    /// Whoever is about to go offers nothing any more: others would give it work.
    pub(crate) fn withdraw(&mut self, member: &Member) {
        if let Some(info) = self.members.get_mut(&member.name) {
            info.offers = [].into();
        }
    }

    /// An operator wants this run to hand everything over and end.
    pub(crate) fn drains(&mut self, member: Member) {
        self.drains.entry(member).or_default();
    }

    /// It says so itself, and needs not to be told.
    pub(crate) fn drains_itself(&mut self, member: &Member) {
        self.drains.remove(member);
    }

    /// Who has to be told now.
    pub(crate) fn drains_to_tell(&mut self, now: Millis) -> Vec<ProcessName> {
        let is_due = |told: &Option<Millis>| told.is_none_or(|at| DRAIN_EVERY_MS <= now.since(at));
        let due = self.drains.iter_mut().filter(|(_, told)| is_due(told));
        due.map(|(member, told)| {
            *told = Some(now);
            member.name.clone()
        })
        .collect()
    }

    pub(crate) fn is_draining(&self, member: &Member) -> bool {
        let row = self.rows.get(&member.name);
        row.is_some_and(|row| row.admission == DRAINING && row.incarnation == member.incarnation.0)
    }

    pub(crate) fn joined(&mut self, joined: &Joined) {
        let Joining { member, zone, capacity, address, .. } = &joined.joining;
        let info = MemberInfo {
            role: Role::Node,
            incarnation: member.incarnation,
            address: address.clone(),
            beat: String::new(),
            offers: joined.offers.clone(),
        };
        self.members.insert(member.name.clone(), info);
        // A cordon is of the name; draining is of one run.
        let before = self.rows.get(&member.name);
        let is_cordoned = before.is_some_and(|row| row.admission == CORDONED);
        let admission = match self.is_draining(member) {
            true => DRAINING,
            false if is_cordoned => CORDONED,
            false => "",
        };
        let row = PutNode {
            name: member.name.to_string(),
            incarnation: member.incarnation.0,
            state: ALIVE.to_owned(),
            reason: Reason::Joined.code().into(),
            zone: zone.clone(),
            address: address.clone(),
            capacity: *capacity,
            capabilities: joined.offers.iter().map(offer_to_message).collect(),
            admission: admission.to_owned(),
        };
        self.rows.insert(member.name.clone(), row);
    }

    /// Notes a change of this very run; gives its row, and the state before.
    pub(crate) fn set(
        &mut self,
        member: &Member,
        state: &str,
        reason: Reason,
    ) -> Option<(PutNode, String)> {
        let row = self
            .rows
            .get_mut(&member.name)
            .filter(|row| row.incarnation == member.incarnation.0)?;
        let mut before = std::mem::replace(&mut row.state, state.to_owned());
        if row.admission == DRAINING && (state == DEAD || state == LEFT) {
            // It was of this run, which is over.
            before = std::mem::take(&mut row.admission);
        }
        row.reason = reason.code().into();
        Some((row.clone(), before))
    }

    /// Takes a dead member out of the view; not a later run of the same name.
    pub(crate) fn remove(&mut self, member: &Member) {
        self.drains.remove(member);
        if self.members.get(&member.name).is_some_and(|info| info.incarnation == member.incarnation)
        {
            self.members.remove(&member.name);
        }
    }

    /// What is known of the end of this run: `node-1#7 dead port_refused`.
    pub(crate) fn fate(&self, member: &Member) -> String {
        let Some(row) = self.rows.get(&member.name) else {
            return format!("{member} did not come");
        };
        if member.incarnation.0 < row.incarnation {
            return format!("{member} {}", Reason::Replaced);
        }
        match u16::try_from(row.reason).ok().and_then(Reason::from_code) {
            Some(reason) => format!("{member} {} {reason}", row.state),
            None => format!("{member} {}", row.state),
        }
    }
}
