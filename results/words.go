// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// targetWords says what a target is.
func targetWords(scenario, target string) string {
	switch scenario + "/" + target {
	case "connect/head":
		return "to the first Service of the chain (head)"
	case "connect/middle":
		return "to the middle of the chain (middle)"
	case "connect/tail":
		return "to the last Service of the chain (tail)"
	case "connect/random":
		return "to Services at random (random)"
	case "tax/pod":
		return "to a pod's own address (pod)"
	case "first/udp", "established/udp":
		return "by UDP (udp)"
	case "established/tcp":
		return "by TCP (tcp)"
	case "udp/exchange":
		return "there and back (exchange)"
	case "nodeport/outside":
		return "from outside the node (outside)"
	case "programming/one":
		return "one Service more (one)"
	}
	return target
}

// figureWords says what a picture or a section shows. target is "" for one that shows several.
func figureWords(k key, target string) string {
	measure := "time"
	if k.unit == instructions {
		measure = "instructions"
	}
	what := or(scenarioWords[k.scenario], k.scenario)
	switch k.scenario {
	case "connect":
		what = "a new connection through a Service"
		if target != "" {
			what, _, _ = strings.Cut("a new connection "+targetWords(k.scenario, target), " (")
		}
	case "tax":
		what = "a new connection to a pod's own address"
	case "programming":
		switch k.metric {
		case "programming":
			return "programming: time until the newest Service answers"
		case "added":
			return "programming: time until one Service more answers"
		case "proxy-programming-cpu":
			return "programming: CPU time of the proxy"
		case "proxy-rss":
			return "memory of the proxy once the Services are programmed"
		}
	}
	switch words := about(k.metric).words; {
	case k.metric == "p50":
		return measure + " of " + what
	case k.metric == "cpu":
		return "CPU time of " + what
	case words != k.metric && about(k.metric).cost:
		return words + " of the " + measure + " of " + what
	}
	return what + ": " + k.metric
}

// scenarioWords say what is measured beside connections.
var scenarioWords = map[string]string{
	"first":       "a flow's first packet to a Service",
	"established": "a packet of an established flow to a Service",
	"udp":         "a question to a Service by UDP and its answer",
	"nodeport":    "a new connection to a NodePort from outside the node",
}

// instructions is the unit of figures that guests count.
const instructions = "instructions"

func upperFirst(s string) string {
	c, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(c)) + s[n:]
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return number(n) + " " + word + "s"
}

// sentences says in words what the verdicts of one scenario's main metric say. What the data do not say is
// not said. Where a chain has a tail, the other targets are left to the table.
func (a *analysis) sentences(verdicts []Verdict) []string {
	tail := slices.ContainsFunc(verdicts, func(v Verdict) bool { return v.Target == "tail" && v.Points > 0 })
	var out []string
	var untaxed []Verdict
	for _, v := range verdicts {
		if m := a.env.mode(v.Mode); m.Floor == "" || v.Points == 0 || tail && v.Target != "tail" {
			continue
		}
		if scenarioWords[v.Scenario] != "" && v.open() {
			continue // the table says it
		}
		if v.Scenario == "tax" && !v.Grows {
			untaxed = append(untaxed, v)
		} else if s := sentence(v); s != "" {
			out = append(out, s)
		}
	}
	return slices.Concat(out, untaxedSentences(untaxed), chainSentences(verdicts))
}

func sentence(v Verdict) string {
	slope := perService(v.Slope, v.Low, v.High, v.Unit)
	from := fmt.Sprintf("%s at %s Services, %s at %s", quantity(v.AtSmallest, v.Unit), number(v.Smallest), quantity(v.AtLargest, v.Unit), number(v.Largest))
	what := fmt.Sprintf("%s (%s, %s)", v.Scenario, v.Target, v.Metric)
	if v.Scenario == "connect" || v.Scenario == "tax" {
		what = "a connection " + targetWords(v.Scenario, v.Target)
	} else if words := scenarioWords[v.Scenario]; words != "" {
		what = fmt.Sprintf("%s (%s)", words, v.Target)
	}
	switch {
	case v.Scenario == "tax" && v.Grows && v.Model == Linear:
		return fmt.Sprintf("**Every new connection on an %s node pays %s per Service, Service or not** (O(n)): %s.", v.Mode, slope, from)
	case v.Scenario == "tax" && v.Grows:
		return fmt.Sprintf("**Every new connection on an %s node pays for the Services that the node carries, Service or not**: %s for each of them on average, %s.",
			v.Mode, slope, from)
	case v.Model == Linear && v.High < 0:
		return fmt.Sprintf("On %s, %s falls with every Service, by %s: %s.", v.Mode, what, slope, from)
	case v.Model == Linear:
		return fmt.Sprintf("On %s, %s grows with every Service, by %s: %s.", v.Mode, what, slope, from)
	case v.Model == Logarithmic:
		doublings := math.Log2(float64(v.Largest) / float64(max(v.Smallest, 1)))
		return fmt.Sprintf("On %s, %s grows with the logarithm of the number of Services, by %s each time it doubles: %s.", v.Mode, what, quantity(v.Rise/doublings, v.Unit), from)
	case v.Model == Constant:
		return fmt.Sprintf("On %s, no growth of %s is found: %s. More than %s over the ladder is excluded with 95 %% confidence; the noise floor is %s.",
			v.Mode, what, from, quantity(v.Bound, v.Unit), quantity(v.Floor, v.Unit))
	case v.Grows:
		return fmt.Sprintf("On %s, %s grows, by %s per Service on average (%s); no growth law is named.", v.Mode, what, slope, from)
	case v.open():
		return fmt.Sprintf("On %s, no growth of %s is seen: %s. But up to %s over the ladder is not excluded, which is more than the noise floor of %s: there is no verdict.",
			v.Mode, what, from, quantity(v.Bound, v.Unit), quantity(v.Floor, v.Unit))
	}
	return ""
}

// open reports whether growth is neither seen nor excluded.
func (v Verdict) open() bool {
	return v.Bound > v.Floor && (v.Low <= 0 && v.High >= 0 || math.Abs(v.Rise) <= v.Floor)
}

// untaxedSentences says of the modes whose tax was not found to grow how much of it the data exclude.
func untaxedSentences(verdicts []Verdict) []string {
	var excluded, open []string
	for _, v := range verdicts {
		switch {
		case v.Model == Constant:
			excluded = append(excluded, fmt.Sprintf("%s (more than %s over the ladder is excluded)", v.Mode, quantity(v.Bound, v.Unit)))
		case v.open():
			open = append(open, fmt.Sprintf("%s (up to %s over the ladder is not excluded; the noise floor is %s)", v.Mode, quantity(v.Bound, v.Unit), quantity(v.Floor, v.Unit)))
		}
	}
	var out []string
	if len(excluded) > 0 {
		out = append(out, fmt.Sprintf("New connections to a pod's own address are not found to pay for Services on %s.", enumerated(excluded)))
	}
	if len(open) > 0 {
		out = append(out, fmt.Sprintf("Whether new connections to a pod's own address pay for Services is not decided on %s.", enumerated(open)))
	}
	return out
}

// enumerated joins with commas and an "and".
func enumerated(list []string) string {
	if len(list) < 2 {
		return strings.Join(list, "")
	}
	last := len(list) - 1
	return strings.Join(list[:last], ", ") + " and " + list[last]
}

// chainSentences relates the middle of a chain to its end.
func chainSentences(verdicts []Verdict) []string {
	var out []string
	for _, tail := range verdicts {
		if tail.Target != "tail" || !tail.Grows {
			continue
		}
		i := slices.IndexFunc(verdicts, func(v Verdict) bool { return v.Mode == tail.Mode && v.Target == "middle" && v.Grows })
		if i >= 0 {
			out = append(out, fmt.Sprintf("On %s, the middle of the chain pays %s of what its end pays per Service.", tail.Mode, formatValue(verdicts[i].Slope/tail.Slope)))
		}
	}
	return out
}

// crossoverSentence says from where on a mode costs more than another.
func crossoverSentence(c Crossover) string {
	interval := fmt.Sprintf("%s to %s", number(int(math.Round(c.Low))), bounded(c.High))
	what := strings.TrimSpace(c.Target + " " + c.Metric)
	return fmt.Sprintf("From %s Services (%s) on, %s costs more than %s (%s, %s).", number(int(math.Round(c.Services))), interval, c.ModeA, c.ModeB, c.Scenario, what)
}

func bounded(x float64) string {
	if math.IsInf(x, 1) {
		return "beyond the ladder"
	}
	return number(int(math.Round(x)))
}
