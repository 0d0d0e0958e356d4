// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// formatValue prints x with three digits that mean something: 0.0153, 1.25, 163, 16300.
func formatValue(x float64) string {
	if math.Abs(x) >= 100 {
		return strconv.FormatFloat(math.Round(x), 'f', -1, 64)
	}
	if x == 0 {
		return "0"
	}
	if math.Abs(x) < 0.001 {
		return strconv.FormatFloat(x, 'g', 2, 64)
	}
	digits := 2 - int(math.Floor(math.Log10(max(math.Abs(x), 0.1))))
	return strconv.FormatFloat(x, 'f', min(digits, 4), 64)
}

// unitStep is a larger unit that reads better from a size on.
type unitStep struct {
	from, divisor float64
	name          string
}

var unitSteps = map[string][]unitStep{
	"ns": {{1e9, 1e9, "s"}, {1e6, 1e6, "ms"}, {1e3, 1e3, "µs"}},
	// Of the clock of a guest, which goes on by instructions and by waiting.
	"virtual_s": {{1, 1, "virtual s"}, {1e-3, 1e-3, "virtual ms"}, {0, 1e-6, "virtual µs"}},
	"bytes":     {{1 << 30, 1 << 30, "GiB"}, {1 << 20, 1 << 20, "MiB"}, {1 << 10, 1 << 10, "KiB"}},
}

// scaleOf returns the unit that a figure of size x reads best in, and what to divide by: 16300 ns/op gives µs/op and 1000.
func scaleOf(x float64, unit string) (name string, divisor float64) {
	if unit == "percent" {
		return "%", 1
	}
	base, per, isRate := strings.Cut(unit, "/")
	for _, s := range unitSteps[base] {
		if math.Abs(x) >= s.from {
			if isRate {
				return s.name + "/" + per, s.divisor
			}
			return s.name, s.divisor
		}
	}
	return unit, 1
}

// quantity prints a figure with its unit: 16.3 µs.
func quantity(x float64, unit string) string {
	if math.IsNaN(x) {
		return "–"
	}
	name, divisor := scaleOf(x, unit)
	return formatValue(x/divisor) + " " + name
}

// spread prints a median with its interval in one unit: 16.3 µs (16.1 to 16.5). A single value has none.
func spread(s summary, unit string) string {
	if math.IsNaN(s.median) {
		return "–"
	}
	if s.n == 1 {
		return quantity(s.median, unit)
	}
	name, divisor := scaleOf(s.median, unit)
	return fmt.Sprintf("%s %s (%s to %s)", formatValue(s.median/divisor), name, formatValue(s.low/divisor), formatValue(s.top/divisor))
}

// perService prints a slope with its interval: 15.2 ns (14.8 to 15.6).
func perService(slope, low, high float64, unit string) string {
	switch {
	case math.IsNaN(slope):
		return "–"
	case math.IsNaN(low):
		return fmt.Sprintf("%s %s", formatValue(slope), unit)
	}
	_, divisor := scaleOf(slope, unit)
	name, _ := scaleOf(slope, unit)
	return fmt.Sprintf("%s %s (%s to %s)", formatValue(slope/divisor), name, formatValue(low/divisor), formatValue(high/divisor))
}

// number prints a count with thousands apart: 20,000.
func number(n int) string {
	s := strconv.Itoa(n)
	sign := ""
	if n < 0 {
		sign, s = "-", s[1:]
	}
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return sign + s
}

func percent(x float64) string {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return "–"
	}
	return formatValue(100*x) + " %"
}

// cell keeps text from breaking a Markdown table.
func cell(s string) string {
	return strings.NewReplacer("|", "\\|", "\r\n", " ", "\n", " ", "<", "&lt;").Replace(s)
}

// markdown prints a table.
func markdown(b *strings.Builder, header []string, rows [][]string) {
	line := func(cells []string) {
		for i := range cells {
			cells[i] = cell(cells[i])
		}
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
	line(header)
	b.WriteString("|" + strings.Repeat("---|", len(header)) + "\n")
	for _, r := range rows {
		line(r)
	}
	b.WriteByte('\n')
}
