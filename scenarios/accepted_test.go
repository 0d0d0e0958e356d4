// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/plimsoll-bench/plimsoll/results"
)

// tallies are those of a run in which a mode's connect takes so many instructions more than direct's 45,000, of which its hook takes some.
func tallies(t *testing.T, kernel string, more, hook float64) []Tally {
	t.Helper()
	record := func(mode, target string, values ...results.Value) results.Record {
		return results.Record{Scenario: "connect", Mode: mode, Target: target, Services: 10, Values: values}
	}
	// A Service of another target shares its bucket.
	chance := results.Value{Metric: "hook", Unit: instructions, Value: hook + 17}
	least := func(n float64) results.Value { return results.Value{Metric: "min", Unit: instructions, Value: n} }
	all, err := TalliesOf([]results.Record{
		record("direct", "head", least(45000)), record("direct", "tail", least(45000)),
		record("ebpf", "head", least(45000+more), chance), record("ebpf", "tail", least(45000+more), results.Value{Metric: "hook", Unit: instructions, Value: hook}),
	}, Stage{Kernel: kernel, QEMU: "7.2", Recipe: "one"})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Counts are held to those of the same kernel, by half a per cent of the whole, and hooks by half a per cent of themselves.
func TestDifferences(t *testing.T) {
	accepted := append(tallies(t, "6.12", 424, 277), tallies(t, "6.18", 500, 300)...)
	for name, c := range map[string]struct {
		kernel     string
		more, hook float64
		lines      []string // how they begin
		known      bool
	}{
		"the same":                     {"6.12", 424, 277, nil, true},
		"within":                       {"6.12", 424 + 227, 278, nil, true},
		"more of the whole":            {"6.12", 424 + 230, 277, []string{"ebpf/connect/head/10/above-direct: 654 instructions, accepted 424", "ebpf/connect/tail/10/above-direct: 654 instructions, accepted 424"}, true},
		"less":                         {"6.12", 424 - 230, 277, []string{"ebpf/connect/head/10/above-direct: 194 instructions", "ebpf/connect/tail/10/above-direct: 194 instructions"}, true},
		"two instructions in the hook": {"6.12", 426, 279, []string{"ebpf/connect/least/10/hook: 279 instructions, accepted 277: +2"}, true},
		"another kernel": {"7.0", 424, 277, []string{
			"ebpf/connect/head/10/above-direct: 424 instructions, and none accepted", "ebpf/connect/least/10/hook: 277 instructions, and none accepted",
			"ebpf/connect/tail/10/above-direct: 424 instructions, and none accepted",
		}, false},
	} {
		lines, known := Differences(accepted, tallies(t, c.kernel, c.more, c.hook))
		same := func(line, begins string) bool { return strings.HasPrefix(line, begins) }
		if known != c.known || !slices.EqualFunc(lines, c.lines, same) {
			t.Errorf("%s: known %t, %q; want %t, %q", name, known, lines, c.known, c.lines)
		}
	}
	lines, _ := Differences(accepted, tallies(t, "6.12", 424, 277)[1:])
	if len(lines) != 1 || !strings.HasSuffix(lines[0], "and not counted") {
		t.Errorf("one that is missing: %q", lines)
	}
}

// New counts replace those of their stage alone, and what is written is read again.
func TestAcceptedFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "accepted.csv")
	if all, err := ReadAccepted(file); err != nil || all != nil {
		t.Errorf("without a file: %v, %v", all, err)
	}
	old, other, fresh := tallies(t, "6.12", 424, 277), tallies(t, "6.18", 500, 300), tallies(t, "6.12", 420, 270.25)
	if err := WriteAccepted(file, Accept(append(old, other...), fresh)); err != nil {
		t.Fatal(err)
	}
	all, err := ReadAccepted(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := range fresh {
		fresh[i].Of, other[i].Of = 0, 0
	}
	if want := append(other, fresh...); !slices.Equal(all, want) {
		t.Errorf("want %v, got %v", want, all)
	}
}

// What was skipped or failed is not accepted.
func TestTalliesOfFailures(t *testing.T) {
	for _, r := range []results.Record{
		{Scenario: "connect", Mode: "ipvs", Target: "tail", Services: 10, Skipped: "no ip_vs"},
		{Scenario: "connect", Mode: "ipvs", Target: "tail", Services: 10, Errors: 1},
	} {
		if _, err := TalliesOf([]results.Record{r}, Stage{}); err == nil {
			t.Errorf("%+v is accepted", r)
		}
	}
}
