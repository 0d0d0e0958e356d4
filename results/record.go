// SPDX-License-Identifier: Apache-2.0

package results

import (
	"bytes"
	"fmt"
	"math"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/perf/benchfmt"
)

// Skips and warnings stand in lines that the benchmark format ignores, each with the name of the benchmark it is about
// and a quoted Go string:
//
//	# skip BenchmarkConnect/provider=lab/…/round=3 "not programmed in 5m0s"
//	# warning BenchmarkConnect/provider=lab/…/round=3 "other processes used 7 % of the CPU"
//	BenchmarkConnect/provider=lab/…/round=3 2000 16300 p50-ns 0 errors
//
// A warning stands before its record. Nothing but a line's end ends a record, so a crash costs at most the line that was being written.
const (
	skipPrefix    = "# skip "
	warningPrefix = "# warning "
	errorsUnit    = "errors"

	// maxLine is below the 64 KiB that benchfmt reads at most.
	maxLine = 60 << 10
)

var scenarioName = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)

// name returns the benchmark's name: BenchmarkConnect/provider=lab/kernel=6.18/mode=ebpf/….
func (r *Record) name() string {
	var b strings.Builder
	b.WriteString("Benchmark")
	b.WriteString(strings.ToUpper(r.Scenario[:1]))
	b.WriteString(r.Scenario[1:])
	fmt.Fprintf(&b, "/provider=%s/kernel=%s/mode=%s/target=%s/services=%d/endpoints=%d/round=%d",
		r.Provider, r.Kernel, r.Mode, r.Target, r.Services, r.Endpoints, r.Round)
	if r.Again {
		b.WriteString("/again=true")
	}
	return b.String()
}

// validate says what in r the format cannot carry.
func (r *Record) validate() error {
	if !scenarioName.MatchString(r.Scenario) {
		return fmt.Errorf("scenario %q is not of the form [a-z][a-z0-9-]*", r.Scenario)
	}
	for _, f := range []struct{ key, value string }{
		{"provider", r.Provider}, {"kernel", r.Kernel}, {"mode", r.Mode}, {"target", r.Target},
	} {
		if f.value == "" {
			return fmt.Errorf("%s is empty", f.key)
		}
		if strings.ContainsFunc(f.value, func(c rune) bool {
			return c == '/' || c == unicode.ReplacementChar || unicode.IsSpace(c) || !unicode.IsPrint(c)
		}) {
			return fmt.Errorf("%s %q holds a slash, a space or what cannot be printed", f.key, f.value)
		}
	}
	if r.Services < 0 || r.Endpoints < 0 || r.Round < 0 || r.Count < 0 || r.Errors < 0 {
		return fmt.Errorf("%s has a negative count", r.name())
	}
	if r.Skipped != "" && len(r.Values) > 0 {
		return fmt.Errorf("%s is skipped and has values", r.name())
	}
	seen := map[string]bool{errorsUnit: true}
	for _, v := range r.Values {
		name := v.Metric + "-" + v.Unit
		switch {
		case v.Metric == "" || v.Unit == "" || strings.Contains(v.Unit, "-") ||
			strings.ContainsFunc(name, func(c rune) bool { return c == unicode.ReplacementChar || unicode.IsSpace(c) || !unicode.IsPrint(c) }):
			return fmt.Errorf("%s: metric %q in unit %q has no name in the benchmark format", r.name(), v.Metric, v.Unit)
		case math.IsNaN(v.Value) || math.IsInf(v.Value, 0):
			return fmt.Errorf("%s: %s is %v", r.name(), name, v.Value)
		case seen[name]:
			return fmt.Errorf("%s has %s twice", r.name(), name)
		}
		seen[name] = true
	}
	return nil
}

// encode returns the lines of r.
func (r *Record) encode() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	var b bytes.Buffer
	name := r.name()
	for _, w := range r.Warnings {
		fmt.Fprintf(&b, "%s%s %s\n", warningPrefix, name, strconv.Quote(w))
	}
	if r.Skipped != "" {
		fmt.Fprintf(&b, "%s%s %s\n", skipPrefix, name, strconv.Quote(r.Skipped))
	} else {
		fmt.Fprintf(&b, "%s %d", name, r.Count)
		for _, v := range r.Values {
			fmt.Fprintf(&b, " %s %s-%s", strconv.FormatFloat(v.Value, 'g', -1, 64), v.Metric, v.Unit)
		}
		fmt.Fprintf(&b, " %d %s\n", r.Errors, errorsUnit)
	}
	for line := range bytes.Lines(b.Bytes()) {
		if len(line) > maxLine {
			return nil, fmt.Errorf("record %s: a line of %d bytes is longer than the benchmark format allows", name, len(line))
		}
	}
	return b.Bytes(), nil
}

// parseName is the inverse of name.
func parseName(name string) (Record, error) {
	var r Record
	base, parts := benchfmt.Name(name).Parts()
	if len(base) == 0 {
		return r, fmt.Errorf("benchmark has no name")
	}
	r.Scenario = strings.ToLower(string(base[:1])) + string(base[1:])
	for _, p := range parts {
		key, value, ok := strings.Cut(strings.TrimPrefix(string(p), "/"), "=")
		if !ok {
			return r, fmt.Errorf("%q is no key=value", p)
		}
		var err error
		switch key {
		case "provider":
			r.Provider = value
		case "kernel":
			r.Kernel = value
		case "mode":
			r.Mode = value
		case "target":
			r.Target = value
		case "services":
			r.Services, err = strconv.Atoi(value)
		case "endpoints":
			r.Endpoints, err = strconv.Atoi(value)
		case "round":
			r.Round, err = strconv.Atoi(value)
		case "again":
			r.Again, err = strconv.ParseBool(value)
		default:
			err = fmt.Errorf("unknown key")
		}
		if err != nil {
			return r, fmt.Errorf("%s=%s: %w", key, value, err)
		}
	}
	return r, nil
}

// parseNote reads what follows "# skip " or "# warning ": a benchmark's name and a quoted text.
func parseNote(line string) (name, text string, err error) {
	name, quoted, _ := strings.Cut(line, " ")
	text, err = strconv.Unquote(quoted)
	if err != nil {
		return "", "", fmt.Errorf("text after the benchmark's name: %w", err)
	}
	return name, text, nil
}

// decode reads records. file is for messages. What follows the last line's end was cut short by a crash and gives a warning.
func decode(b []byte, file string) (records []Record, warnings []string, err error) {
	if end := bytes.LastIndexByte(b, '\n') + 1; end < len(b) {
		warnings = append(warnings, fmt.Sprintf("%s ends within a line of %d bytes, which is left out: the run was cut short", RecordsFile, len(b)-end))
		b = b[:end]
	}
	type placed struct {
		Record
		line int
	}
	var found []placed
	pending := map[string][]string{} // warnings whose record has not come yet
	notes := map[int]map[string][]string{}

	fail := func(line int, err error) error { return fmt.Errorf("%s:%d: %w", file, line, err) }
	line := 0
	for text := range bytes.Lines(b) {
		line++
		s := strings.TrimRight(string(text), "\r\n")
		switch {
		case strings.HasPrefix(s, warningPrefix):
			name, w, err := parseNote(s[len(warningPrefix):])
			if err != nil {
				return nil, nil, fail(line, err)
			}
			pending[name] = append(pending[name], w)
		case strings.HasPrefix(s, skipPrefix):
			name, reason, err := parseNote(s[len(skipPrefix):])
			if err != nil {
				return nil, nil, fail(line, err)
			}
			short, ok := strings.CutPrefix(name, "Benchmark")
			if !ok || reason == "" {
				return nil, nil, fail(line, fmt.Errorf("a skip wants a benchmark's name and a reason"))
			}
			r, err := parseName(short)
			if err == nil {
				r.Skipped, r.Warnings = reason, pending[name]
				err = r.validate()
			}
			if err != nil {
				return nil, nil, fail(line, err)
			}
			delete(pending, name)
			found = append(found, placed{r, line})
		case strings.HasPrefix(s, "Benchmark"):
			if len(pending) > 0 {
				notes[line], pending = pending, map[string][]string{}
			}
		}
	}

	reader := benchfmt.NewReader(bytes.NewReader(b), file)
	for reader.Scan() {
		switch res := reader.Result().(type) {
		case *benchfmt.SyntaxError:
			return nil, nil, res
		case *benchfmt.Result:
			_, line := res.Pos()
			r, err := parseResult(res)
			if err != nil {
				return nil, nil, fail(line, err)
			}
			name := r.name()
			r.Warnings = notes[line][name]
			delete(notes[line], name)
			found = append(found, placed{r, line})
		}
	}
	if err := reader.Err(); err != nil {
		return nil, nil, fmt.Errorf("read records: %w", err)
	}
	sort.SliceStable(found, func(i, j int) bool { return found[i].line < found[j].line })
	for _, f := range found {
		records = append(records, f.Record)
	}
	// A warning without a record is one whose record a crash took.
	for _, m := range notes {
		for name, texts := range m {
			pending[name] = append(pending[name], texts...)
		}
	}
	var lost []string
	for name, texts := range pending {
		for _, t := range texts {
			lost = append(lost, fmt.Sprintf("%s: %s (no record follows)", name, t))
		}
	}
	sort.Strings(lost)
	return records, append(warnings, lost...), nil
}

// parseResult turns what benchfmt read into a record, with the units that were written.
func parseResult(res *benchfmt.Result) (Record, error) {
	r, err := parseName(string(res.Name))
	if err != nil {
		return r, err
	}
	r.Count = int64(res.Iters)
	for _, v := range res.Values {
		value, name := v.Value, v.Unit
		if v.OrigUnit != "" { // benchfmt turns ns into seconds
			value, name = v.OrigValue, v.OrigUnit
		}
		if name == errorsUnit {
			r.Errors = int64(value)
			continue
		}
		i := strings.LastIndexByte(name, '-')
		if i < 0 {
			return r, fmt.Errorf("unit %q is not of the form metric-unit", name)
		}
		r.Values = append(r.Values, Value{Metric: name[:i], Unit: name[i+1:], Value: value})
	}
	return r, r.validate()
}
