//! `gradlens fetch --sae`: which files of a repository of SAEs are fetched.

use crate::repo::{Content, Kind, Repository};
use crate::world::World;

const SAES: &str = "org/saes";

fn world() -> World {
    let world = World::new();
    let files = [
        "README.md",
        "resid_3/ae.pt",
        "mlp_out_layer_3/trainer_0/ae.pt",
        "mlp_out_layer_3/trainer_0/config.json",
        "mlp_out_layer_11/trainer_0/ae.pt",
        "mlp_out_layer_11/trainer_0/log.txt",
        "mlp_out_layer_x/trainer_0/ae.pt",
    ];
    let files = files.iter().map(|path| ((*path).to_owned(), Content::new(path, path.as_bytes())));
    world.hub.add(Repository::new(Kind::Model, SAES, files.collect()));
    world
}

fn fetched(world: &World) -> Vec<String> {
    let start =
        format!("models--org--saes/snapshots/{}/", world.hub.repository(Kind::Model, SAES).sha("main"));
    world.cache().keys().filter_map(|path| path.strip_prefix(&start).map(str::to_owned)).collect()
}

#[test]
fn a_layers_number_stands_for_all() {
    let world = world();
    world
        .ok(&format!("fetch --sae {SAES}/mlp_out_layer_{{layer}}/trainer_0"))
        .out(SAES)
        .out("SAEs     3 files");
    assert_eq!(
        fetched(&world),
        [
            "mlp_out_layer_11/trainer_0/ae.pt",
            "mlp_out_layer_3/trainer_0/ae.pt",
            "mlp_out_layer_3/trainer_0/config.json"
        ]
    );
    world.ok(&format!("fetch --sae {SAES}"));
    assert!(fetched(&world).contains(&"resid_3/ae.pt".to_owned()));
    assert!(!fetched(&world).iter().any(|path| path.ends_with(".md") || path.ends_with(".txt")));
}

#[test]
fn what_is_not_there_is_said() {
    let world = world();
    world.fails(&format!("fetch --sae {SAES}/mlp"), &["no SAE files", SAES, "mlp", "resid_3"]);
    world.fails("fetch --sae no/saes", &["no/saes", "hint: "]);
    for sae in ["saes", "/org/saes"] {
        world.misuse(&format!("fetch --sae {sae}"), &["--sae", "owner/name", "hint: "]);
    }
}
