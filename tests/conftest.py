"""Every test runs on one thread: the models are tiny, and more threads only wait for each other."""

import os
from itertools import count

import pytest
import torch

torch.set_num_threads(1)

THINNED = {
    "test_a_function_is_shown_all_that_it_selects": 2,
    "test_a_head_taken_out_is_a_weight_set_to_zero": 3,
    "test_a_model_equals_its_twin": 3,
    "test_a_page_is_complete_and_nothing_overlaps": 3,
    "test_a_patch_is_drawn_where_its_pixels_came_from": 2,
    "test_a_plain_reading_function_changes_nothing": 6,
    "test_a_static_step_equals_an_ordinary_one": 3,
    "test_a_step_waits_only_to_learn_whether_every_row_has_ended": 2,
    "test_an_edit_changes_exactly_what_lies_downstream": 7,
    "test_an_example_runs_and_stays_short": 3,
    "test_an_interpreted_kernel_equals_the_reference": 0,
    "test_an_interrupted_evaluation_goes_on_where_it_was": 0,
    "test_any_intervention_equals_a_full_forward_pass_in_float64": 5,
    "test_boxes_tile_what_the_model_sees": 4,
    "test_bytes_are_told_before_a_run": 4,
    "test_cache_bytes_are_the_size": 4,
    "test_checks_see_a_wrong_kernel_and_a_wrong_path": 0,
    "test_edits_that_autograd_does_not_count_take_effect_too": 4,
    "test_estimates_are_the_first_order_of_patching": 14,
    "test_every_cell_is_a_full_run": 8,
    "test_every_cell_of_blip_is_a_full_run_of_hugging_faces": 2,
    "test_every_decoder_hook_holds_in_every_step": 0,
    "test_every_metric_is_differentiated": 3,
    "test_every_output_pixel_comes_from_where_the_map_says": 3,
    "test_every_question_equals_two_log_softmaxes_in_float64": 5,
    "test_every_single_hook": 4,
    "test_every_split_equals_loops_over_the_weights": 3,
    "test_every_variant_finds_the_same": 0,
    "test_every_way_to_an_operation_agrees": 3,
    "test_everything_closes": 3,
    "test_everything_is_bit_equal_to_hugging_face": 3,
    "test_everything_restored_is_clean": 4,
    "test_generate_replays_one_recording_per_room": 2,
    "test_graddrop_is_that_of_detached_blocks": 7,
    "test_gradients_arrive_at_every_hook": 4,
    "test_greedy_over_configurations": 3,
    "test_greedy_tokens_are_hugging_face_s": 3,
    "test_groups_by_role_word_and_object": 0,
    "test_heads_and_mlps_equal_two_full_runs": 7,
    "test_loading_and_a_picture_bring_in_what_they_need": 0,
    "test_logits_are_bit_equal_over_configurations": 4,
    "test_logits_are_bit_equal_over_inputs": 4,
    "test_logits_of_every_step_are_hugging_face_s": 3,
    "test_matplotlib_is_imported_when_something_is_drawn_and_no_global_figure_is_made": 0,
    "test_mean_attention_shows_it_less_often": 0,
    "test_missing_rivals_say_why": 0,
    "test_names_and_terminals_that_are_not_utf_8": 0,
    "test_no_cell_is_lost_where_there_are_more_than_pixels": 0,
    "test_nothing_heavy_is_imported": 0,
    "test_odd_configurations_are_hugging_faces_to_the_bit": 3,
    "test_on_the_embedded_model_estimates_go_with_exact_effects": 2,
    "test_patching_under_looking_at_equals_a_loop_by_hand": 3,
    "test_photos_painted_patch_by_patch_with_the_real_bicubic_resize": 3,
    "test_pixel_patch_token_and_back": 4,
    "test_prepared_inputs_are_hugging_faces": 3,
    "test_relevancy_is_the_matrix_product_of_the_definition": 3,
    "test_rows_of_a_batch_are_as_alone": 4,
    "test_sampled_tokens_are_hugging_face_s": 2,
    "test_senders_sum_to_the_effect_of_a_receivers_input": 4,
    "test_so_are_those_of_the_other_direction_of_full_passes_and_of_a_longer_row": 3,
    "test_sums_close_at_every_layer_and_position": 3,
    "test_sweeps_take_longer_than_their_floors": 3,
    "test_the_asked_objects_patches_bring_the_answer_back": 0,
    "test_the_bytes_foretold_are_the_bytes_held": 2,
    "test_the_estimate_is_the_size": 3,
    "test_the_exact_part_is_that_of_patching": 4,
    "test_the_fused_path_is_the_reference_up_to_rounding": 11,
    "test_the_loop_over_the_stream_equals_brute_force": 2,
    "test_the_report_points_at_what_is_broken": 3,
    "test_the_softmax_is_exact_with_qk": 9,
    "test_the_strongest_patch_is_on_the_asked_object": 0,
    "test_the_strongest_patch_lies_on_the_asked_object": 0,
    "test_the_strongest_patch_moves_when_the_other_object_is_asked": 0,
    "test_tower_and_projector": 2,
    "test_training_runs_and_resumes": 0,
    "test_what_is_formed_is_what_the_forward_forms_to_the_bit": 3,
}
"""Tests over many configurations, of which the fast suite runs every k-th (0: none); the others are marked slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    counters: dict[str, count] = {}
    for item in items:
        name = getattr(item, "originalname", item.name)
        every = THINNED.get(name, 1)
        if not every or next(counters.setdefault(name, count())) % every:
            item.add_marker(pytest.mark.slow)


def pytest_xdist_auto_num_workers(config):
    """Processes that share the whole suite; a file or a test that is named runs in this one (`-n` says otherwise)."""
    whole = list(config.args) == list(config.getini("testpaths"))
    return min(os.cpu_count() or 1, 4) if whole else 0
