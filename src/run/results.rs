//! What a run adds up: sums of dimensions, or of SAE features.

use std::collections::BTreeMap;

use crate::backend::{FeatureValues, Moments};
use crate::model::op::Site;
use crate::stats::{Direction, LayerFeatures, LayerMoments, Quantity, SiteMoments, Skipped};

/// Sums of each wanted layer.
pub(super) enum Results {
    /// Of the dimensions of sites.
    Dimensions(SiteMoments),
    /// Of SAE features.
    Features(BTreeMap<usize, LayerFeatures>),
}

/// The sums of one layer and one quantity.
pub(super) struct Summed<'a> {
    pub layer: usize,
    pub quantity: Quantity,
    /// Sums that were not asked for are empty.
    pub moments: &'a Moments,
    /// The same of position 0 of each sample alone.
    pub at_0: Option<&'a Moments>,
    /// Of features: what else is known of their activations.
    pub features: Option<&'a FeatureValues>,
}

impl Results {
    /// Everything there is of `site`, values first, layers ascending.
    pub fn summed(&self, site: Site) -> Vec<Summed<'_>> {
        let mut all: Vec<Summed<'_>> = match self {
            Self::Dimensions(sites) => {
                let own = sites.iter().filter(|((_, own), _)| *own == site);
                own.flat_map(|(&(layer, _), sums)| dimensions(layer, sums)).collect()
            }
            Self::Features(layers) => {
                layers.iter().flat_map(|(&layer, sums)| features(layer, sums)).collect()
            }
        };
        all.sort_by_key(|summed| summed.quantity);
        all
    }

    /// What was left out of each layer at `site`, ascending.
    pub fn skipped(&self, site: Site) -> Vec<(usize, Skipped)> {
        match self {
            Self::Dimensions(_) => {
                self.dimensions(site).into_iter().map(|(layer, sums)| (layer, sums.skipped)).collect()
            }
            Self::Features(layers) => layers.iter().map(|(&layer, sums)| (layer, sums.skipped)).collect(),
        }
    }

    /// Of features.
    pub fn features(&self) -> Option<&BTreeMap<usize, LayerFeatures>> {
        match self {
            Self::Dimensions(_) => None,
            Self::Features(layers) => Some(layers),
        }
    }

    /// Of the dimensions of `site`, by layer.
    pub fn dimensions(&self, site: Site) -> Vec<(usize, &LayerMoments)> {
        match self {
            Self::Dimensions(sites) => {
                let own = sites.iter().filter(|((_, own), _)| *own == site);
                own.map(|(&(layer, _), sums)| (layer, sums)).collect()
            }
            Self::Features(_) => Vec::new(),
        }
    }
}

fn dimensions(layer: usize, sums: &LayerMoments) -> Vec<Summed<'_>> {
    let each = [(Quantity::Values, Direction::Values), (Quantity::Gradients, Direction::Gradients)];
    let summed = |(quantity, direction)| {
        let (moments, at_0) = (sums.get(direction)?, sums.at_0(direction));
        Some(Summed { layer, quantity, moments, at_0, features: None })
    };
    each.into_iter().filter_map(summed).collect()
}

fn features(layer: usize, LayerFeatures { sums, .. }: &LayerFeatures) -> Vec<Summed<'_>> {
    let values = sums.values.as_ref();
    let each = [
        (Quantity::Values, values.map(|values| &values.moments)),
        (Quantity::Gradients, sums.gradients.as_ref()),
        (Quantity::Attribution, sums.attribution.as_ref()),
    ];
    let summed = |(quantity, moments): (Quantity, Option<_>)| {
        let features = values.filter(|_| quantity == Quantity::Values);
        Some(Summed { layer, quantity, moments: moments?, at_0: None, features })
    };
    each.into_iter().filter_map(summed).collect()
}
